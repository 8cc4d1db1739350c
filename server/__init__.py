"""What runs at the coordinator: app (Flower's ServerApp), strategy (rounds: order, checks, quorum, checkpoint)."""
