"""On magi_attention; see magi_attention.dropin."""

from magi_attention.dropin import contents

globals().update(contents(__name__))
