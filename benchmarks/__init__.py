"""What things cost, side by side with floors and peers: `python -m benchmarks`.

General layout, each module importing only those above it:

    measure     the method: interleaved samples of all contenders, best and median; nothing here judges
    model       what a row is: Row, Budget, Subject, and how a statement becomes a loop
    floors      the least there could be: a dict with a lock, the queues of the standard library
    peers       other libraries, each imported when it is first used
    ours        our own store, in the shapes that the rows compare
    reads_writes  rows: one operation at a time
    layers      rows: middleware and hooks
    watching    rows: one write that many watches receive
    latency     rows: from task to task, thread to thread, loop to thread and back
    concurrency rows: several threads at once
    growth      rows: many keys, many watches, what they weigh, what the import takes
    engines     rows: SQLite and Redis next to their clients used by hand; from process to process; watches of SQLite
    rows        all rows, and how they are chosen
    table       the table, as text and as JSON
    picture     `python -m benchmarks.picture RESULTS.json > docs/performance.svg`

A row is data: a name, a unit, a budget if it has one, and contenders. What a budget counts in, another contender or
baseline sets, is measured in the row itself. A new one is a few lines in the module of its theme; what several subjects
can do is written once for each of them, as a statement, under the name of the row.
"""
