"""Fuzzing of everything that is parsed from sockets: a seeded mutation fuzzer, and a coverage-guided one."""
