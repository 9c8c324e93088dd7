"""A fuzzer over every reader of outside data, and a harness that kills commands at random moments.

`python -m tests.fuzz --inputs 1000` fuzzes, `python -m tests.fuzz.kills --count 100` kills; `make endure` does both for
long and keeps a report.
"""
