"""Text on the screen while it is decoded: drafts kept and rejected, the verifier's own tokens, and the speed."""
