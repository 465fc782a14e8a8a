"""Values: what the rooms hand each other: graphs, plans, clusters, profiles, traces. No torch, no ray."""
