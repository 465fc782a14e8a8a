"""Usual: the ways in which people train several tasks today, and the paper's planner, as placed slices.

baselines   waves of each way
allocate    devices by MetaOp at the paper's continuous optimum
waves       a level's allocation cut into waves
place       waves onto devices
"""
