import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # oracles and reference are modules of the suite, not a package

# A suite started in the background of a script inherits an ignored SIGINT, and so would the children whose interruption is tested.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
