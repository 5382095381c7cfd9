"""
What the scripts have in common as commands.

    import command          before the packages that may be missing
    @command.line
    def main(): ...

An error of the user's, a missing package among them, is one line with the script's name. A reader who has
read enough (`| head -1`) ends a script in silence, as other programs. Streams that are closed lead nowhere.
"""
import functools
import os
import sys

SMALL, LARGE = "dev/requirements.txt", "dev/requirements-torch.txt"
PACKAGES = dict.fromkeys(("numpy", "safetensors", "tokenizers", "transformers", "jinja2", "gguf",
                          "matplotlib", "tqdm", "huggingface_hub"), SMALL)
PACKAGES.update(dict.fromkeys(("torch", "lm_eval", "datasets", "scipy"), LARGE))
PIPE_CLOSED = 141  # exit status of a program that SIGPIPE has ended, as a shell sees it


def script():
    """The name of the script that runs."""
    return os.path.basename(sys.argv[0])


def words(error):
    """An error in one line; of a missing package, what installs it."""
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        error = f"the package {error.name} is missing; pip install -r {PACKAGES[error.name]}"
    return f"{script()}: {error}"


def say_missing(kind, error, trace):
    """sys.excepthook: a missing package as one line, anything else as Python has it."""
    if kind is ModuleNotFoundError and error.name in PACKAGES:
        print(words(error), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def line(main):
    """`main` of a script; its errors become one line."""
    @functools.wraps(main)
    def run():
        try:
            try:
                main()
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be written
            sys.exit(PIPE_CLOSED)
        except KeyboardInterrupt:
            sys.exit(f"{script()}: stopped")
        except (ImportError, OSError, ValueError) as error:
            sys.exit(words(error))
    return run


sys.excepthook = say_missing
for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, mode))
