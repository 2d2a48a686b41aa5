"""Five systems that treat the weights of networks as data.

Run as a script (`python -m stages.<system>.<stage>`, sys.argv[0] is "-m" then), Python's garbage collector pauses until
`stages.common.stage.run`: importing torch and its like makes half a million objects, none of them garbage, and to look through
them again and again takes a fifth of the time of all imports or more. Where this is imported, nothing is changed.
"""

import gc
import sys

if sys.argv[:1] == ["-m"]:
    gc.disable()
