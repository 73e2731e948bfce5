"""The programs. `task` in conf/recipe/NAME.yaml names a module of this package; nothing lists them.

A recipe defines

- `run(session)`: the program;
- `check(config)`, optional: refuse settings before anything is opened;
- `PROCESSES`, optional: "one" (default); "any" if a launcher may start several processes; "led" if several may share
  the backbone's experts while rank 0 runs the program; "none" if the program needs no torch.
"""
