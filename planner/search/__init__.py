"""Search: a Problem in, the best schedule found with counted work out.

model           what the search works on: plain numbers, forward or reversed in time
wave_lp         who should have done how much by when
list_scheduler  simulation of a cluster, layer by layer, that follows these targets
heuristics      how such a simulation decides
beam            many simulations side by side, the promising ones kept
orders          which MetaOp may start in which wave of the wave LP
decode placed   lists of slices into schedules, without and with devices
improve         simulated annealing of lists of slices
device_pool     which devices a slice takes, and what bringing its input costs
finish          the slices found, on numbered devices at exact times
work            a time limit as counted work, so that plans do not depend on the load
run             all of it within a budget of work
"""
