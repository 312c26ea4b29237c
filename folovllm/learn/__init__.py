"""The learning system: write a part of the engine yourself, and let the engine's own rules grade it.

Milestone: M0 to M10. vLLM counterpart: none. Row 5, without torch: only the worker process of an exercise about tensors
imports it.

    exercise.py    an exercise of milestones/mN/exercises: its exercise.toml, its files, its place in the order
    check.py       what checks.py of an exercise is written with: the decorator `check`, and `Mine`
    contract.py    does the learner's class fit, and is it really the learner's?
    defaults.py    the checks that every exercise gets: traces on the toy engine, tokens of a real one
    grade.py       runs the checks of an exercise in this process; as a program, the worker
    worker.py      starts the worker, and ends a check that takes too long
    story.py       results as text
    ask.py         hints, predictions, solutions
    record.py      work/.results.jsonl: everything that was checked, asked and answered
    files.py       writes files and records for all of them
    workspace.py   the folder work/: created, found, reset
    mine.py        the engine made of the parts that passed
    toy_engine.py  the real scheduler and KV cache on a fake model
    questions.py   the records of the interview questions
    quiz.py        asks questions, grades answers and remembers them; mock.py: a mock interview; cards.py: flash cards

tests/learn_guards.py holds every exercise to its promises: the reference passes, every mutant is caught.
"""
