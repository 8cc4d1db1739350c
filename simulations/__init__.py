"""One machine's tools, and what is measured with them.

cohort           phantom hospitals
launch           `flwr run`, truthfully
consortium       a deployment on one machine, from kits; deploy_demo: all of it shown
in_process       a federation inside one process
cli              isocenter run, compare, phantom
speed            our losses beside what one would write or install; speed_deployment: rounds beside NVFlare's, through relay
coloured_digits  FairKL where colour gives digits away
age_maps         representations by age, objective by objective
methods          other people's federated training, in our loop
baselines        every baseline of site-effect removal, as embeddings
site_removal     all methods on the same held-out subjects
planted          known truth against what the evaluation finds, with planted_tables, planted_images and planted_measures
"""
