"""The one exception that stands for a mistake of the user, not of the program."""


class InputError(Exception):
    """Bad input, in one sentence that names the file, the key and the value; generate.py prints it and exits with 2."""
