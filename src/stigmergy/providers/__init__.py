"""Providers: the contract of `stigmergy.Store`, kept by an engine. docs/writing-a-provider.md says how to write one."""
