"""Learning: phases, optimizer, schedule, losses, checkpoints and the one loop."""
