"""What every script needs and no paper describes.

Import it before torch and before MuJoCo: it sets the environment variables that they read once.
"""

from support.machine import set_library_variables

set_library_variables()
