"""What a site holds, from a folder of scans or a table of features to batches of views.

``manifest`` is the table of a site's scans and of what is wrong with it; ``bids`` reads a folder into a manifest and
``volumes`` decodes each scan once into a memory-mapped cache on one grid; ``table`` reads rows of features instead;
``site`` lays the rows of the manifest beside the volumes or features; ``sampling`` says which scans make a batch, and
``views`` makes two augmented views of it.
"""
