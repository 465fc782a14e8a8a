"""Record: a task function and a batch in; the list of torch calls that depend on parameters out.

Each step the user's function runs on its samples. What depends on the batch alone is computed for real; what depends on
parameters is only recorded, on meta tensors of concrete shape. So sizes may change from step to step.

recorder      the torch function mode that computes or records
lazy          which tensors depend on parameters, and what code may ask of them
functions     calls that need another form to be recorded: writes, boolean masks
skeleton      the user's modules with meta parameters, their repeated layers (blocks) as single calls
recording     what came out: nodes and values; and how nodes are executed
sites         the place in the user's code that a call was made from
draws         random numbers by their place in training
randomness    the modes under which random functions draw by their place
replacements  what stands in for each random function of torch
"""
