"""Programs: what each rank does, instruction by instruction; made from a Plan, written as text."""
