"""Report: plans in, text and numbers for people out.

render     a plan as a Gantt chart of 100 columns, a summary, and a table
instead    the plan beside what people would use instead
likely     how sure its step and its gain are
explain    why each MetaOp got its devices, what bounds the makespan, where the idle time is; explained: in sentences
compare    two plans side by side
sizes      one workload on several numbers of devices
advice     what would help most
rates      what a step does a second
figures    numbers as text
"""
