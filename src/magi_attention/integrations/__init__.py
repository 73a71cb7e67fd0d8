"""The library inside other frameworks, one module each; a module imports its framework, nobody imports a module."""
