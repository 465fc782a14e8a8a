"""Report: plans in, text and numbers for people out.

render    a plan as a Gantt chart of 100 columns, and as a table
explain   why each MetaOp got its devices, what bounds the makespan, where the idle time is
compare   two plans side by side; one MetaGraph on several numbers of devices
advice    what would help most
rates      what a step does a second
"""
