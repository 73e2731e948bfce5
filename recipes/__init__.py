"""The programs. `task` in conf/recipe/NAME.yaml names a module of this package; nothing lists them.

A recipe defines

- `run(session)`: the program;
- `check(config)`, optional: refuse settings before anything is opened;
- `PROCESSES`, optional: "one" (default), "any" if a launcher may start several processes, or "none" if the program
  needs no torch;
- `FOLDER`, optional: a `FolderUse`, its use of `output_dir` (default `run`), which is locked before `run` is called.
"""
