"""The stored format of DeepSeek-V4, both ways: shards, names, FP8 and FP4 codecs, fingerprint."""
