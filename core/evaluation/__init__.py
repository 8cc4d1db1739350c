"""What a representation knows: embeddings of scans, frozen probes on them, figures with intervals.

embeddings    Embeddings: the representation of scans and what is known about each, as one table
intervals     Evaluation, metrics.json, the subject bootstrap
outcomes      what each held-out scan said of a figure; paired differences between two representations
participants  who takes part in a figure
probes        site and scanner predictability, age, sex, diagnosis; the floor; the 2-D map; evaluate, probe_outcomes
spread        how sites lie without a probe: iLISI, silhouette, MMD, variance explained
openbhb       the protocol and score of the OpenBHB challenge
sums          probes from sums alone
federated     what sites and server do in turn to evaluate from sums
reading       representations of a run, a file or somebody else's table
words         digits, intervals, the verdict
command       what `isocenter evaluate` does
"""
