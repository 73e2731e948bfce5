"""What a head would be accepted on given texts, for every draft length, without a decoding loop."""
