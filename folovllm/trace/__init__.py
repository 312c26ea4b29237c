"""What the engine did, step by step: records to look at, to check against the rules, and to compare with others.

Milestone: M2. vLLM counterpart: none (its stats loggers keep sums, and its OpenTelemetry spans times, not decisions).

    record.py   the schema, and the reader that fills in what the writer left out
    recorder.py Recorder, which makes the records, and NullTrace, which makes none
    writer.py   TraceWriter: the records as a file
    live.py     the records of a running engine, which begin with a snapshot
    watch.py    hands those on to all watchers of a server
    header.py   the first line
    replay.py   the state of the engine, rebuilt from the records alone
    lint.py     the rules of scheduling and paging, checked on a trace
    diff.py     the first step in which two traces differ, and why
    show.py     one step as text
    view.py     all steps of one or two traces as an HTML page, made from viewer/
    perfetto.py all steps as Chrome trace events, for ui.perfetto.dev

Row 1: no torch.
"""
