"""The learning side: the trainer daemon and the methods that it is compared with."""
