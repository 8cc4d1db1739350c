"""What a representation knows: embeddings of scans, frozen probes on them, figures with intervals.

embeddings   Embeddings: the representation of scans and what is known about each, as one table
intervals    Evaluation, metrics.json, the subject bootstrap
probes       site and scanner predictability, age, sex, diagnosis; the floor; the 2-D map
"""
