"""What an assembly would do on machines that are not here: its router, schedulers and cache
managers over steps that take the time that a platform's steps were measured to take. Time is
virtual.

    measure.py     a platform's steps, timed ──▶ step_times.py, a file
    workload.py    who asks for what, and when
    fleet.py       an assembly and files of step times ──▶ replicas
    loop.py        the events, one after the other ──▶ figures.py

Imports no torch, but to measure.
"""
