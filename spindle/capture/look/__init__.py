"""Look: a task and its first batches in; what mixes samples, and along what each value may be cut, out.

looker    records the task on its first batches, and puts together what is found
samples   chooses the batches, and the samples of them, whole and in parts
trials    compares the shapes of wholes and parts
prober    compares their numbers
refusals  says what a planned run cannot do as the code does it
"""
