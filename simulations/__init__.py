"""One machine's tools: cohort (phantom hospitals), launch (`flwr run`, truthfully), loopback and in_process federations, cli."""
