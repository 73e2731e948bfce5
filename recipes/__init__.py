"""The programs. A recipe is a module here, which `task` in conf/recipe/NAME.yaml names; none is listed anywhere.

It holds

- `run(session)`: the program;
- `check(config)`, optional: refuse settings before anything is opened;
- `PROCESSES`, optional: "any" where a launcher may start several processes (default "one"), "none" where it computes
  nothing with torch.
"""
