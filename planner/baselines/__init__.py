"""Baselines: the ways in which people train several tasks today, and the paper's planner, as placed slices.

baselines     waves of each way that this runtime can run
levels        MetaLevels, in which tiny MetaOps take none
allocate      devices by MetaOp at the paper's continuous optimum
waves         a level's allocation cut into waves
place         waves onto devices
paper         the paper's whole planner
overlap       steps with reductions in buckets
alternatives  DDP, ZeRO, FSDP2 and groups of devices, each with its memory choice
"""
