"""Embedding whole collections: a folder of audio in, Parquet out, in shards that are whole or not there."""
