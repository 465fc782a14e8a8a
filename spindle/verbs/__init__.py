"""Verbs: what users call: plan, profile, verify, train, evaluate. Each is a few lines around other rooms."""
