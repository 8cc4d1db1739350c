"""What a site holds, from a folder of scans or a table of features to batches of views.

``manifest`` is the table of a site's scans and of what is wrong with it; ``labels`` reads ages, sexes and diagnoses from any
table; ``bids``, ``openbhb`` and ``files`` read a folder into a manifest, ``medmnist`` a file of small images and ``table`` rows
of features. ``decode`` opens an image file or says in a sentence why not; ``volumes`` brings it to one grid; ``cache`` keeps it
memory-mapped, so that each scan is decoded once. ``site`` lays the rows of the manifest beside the volumes or features;
``sampling`` says which scans make a batch, ``feed`` reads the next one while the model is busy, ``augment`` holds the pieces
that may change an image and ``views`` makes two augmented views of it.
"""
