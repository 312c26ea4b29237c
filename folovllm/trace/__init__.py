"""What the engine did, step by step: records to look at, to check against the rules, and to compare with others.

Milestone: M2. vLLM counterpart: none (its stats loggers keep sums, and its OpenTelemetry spans times, not decisions).
Left out so far: export to Perfetto and the HTML viewer.

    record.py   the schema, and the reader that fills in what the writer left out
    writer.py   TraceWriter, and NullTrace, which records nothing
    replay.py   the state of the engine, rebuilt from the records alone
    lint.py     the rules of scheduling and paging, checked on a trace
    diff.py     the first step in which two traces differ, and why
    show.py     one step as text

Row 1: no torch.
"""
