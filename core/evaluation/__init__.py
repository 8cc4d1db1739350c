"""What a representation knows: embeddings of scans, frozen probes on them, figures with intervals.

embeddings        Embeddings: the representation of scans and what is known about each, as one table
intervals         Evaluation, metrics.json, the subject bootstrap
outcomes          what each held-out scan said of a figure; paired differences between two representations
participants      who takes part in a figure
probes            site and scanner predictability, age, sex, diagnosis; the floor; the 2-D map; evaluate, probe_outcomes
predictions       Predictions of a fine-tuned model: figures at an operating point, calibration, a pseudonymous table
spread            how sites lie without a probe: iLISI, silhouette, MMD, variance explained
openbhb           the protocol and score of the OpenBHB challenge
sums              what probes from sums share
age_sums          age by ridge regression, from sums
class_sums        site, scanner, diagnosis by a linear probe, from sums
score_sums        a binary label by its scores, from histograms
federated_site    what a site tells when all probes are from sums
federated_server  what the server makes of it
reading           representations of a run, a file or somebody else's table
words             digits, intervals, the verdict
command           what `isocenter evaluate` does
"""
