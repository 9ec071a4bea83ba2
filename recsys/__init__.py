"""A recommender that learns while it serves: the shared nouns and the serving side."""

__version__ = "0.1.0"
