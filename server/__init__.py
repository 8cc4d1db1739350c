"""What runs at the coordinator: app (Flower's ServerApp), strategy (rounds: order, checks, quorum, checkpoint).

Around the runs: consortium (who takes part), provision (the kits for server and sites), superlink (the server, kept running).
"""
