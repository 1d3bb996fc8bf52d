"""What the contract is made of. Not for programs: names in here may change at any time."""
