"""Search: a Problem in, the best schedule found with counted work out.

model      what the search works on: plain numbers, forward or reversed in time
fluid      the wave LP: who should have done how much by when
track      simulation of a cluster, layer by layer, that follows these targets
beam       many such simulations side by side, the promising ones kept
decode     lists of slices into schedules
improve    simulated annealing of lists of slices
pool      which devices a slice takes, and what bringing its input costs
run        all of it within a budget of work
"""
