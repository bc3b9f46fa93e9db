"""The Python functions that a call enters: a measure of its cost that no load of the machine changes."""

import sys


def entered(function, below=""):
    """Returns the names of the functions that a call enters, those of files whose path begins with ``below`` alone."""
    names = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(below):
            names.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return names
