"""Code shared by the language models of the zoo: attention, the backbone, its loss, checkpoints."""
