"""Triton's interpreter without the half of its time in which it prepares what is prepared already.

Whenever a device function is called, it looks through all of `triton.language` for what it must replace while a kernel
runs, though the launch of the kernel has replaced that. And it works out whether integers overflow, for an assertion
that only `debug=True` lets it make.
"""

from contextlib import suppress
from dataclasses import replace


def speed_up_the_interpreter():
    """Does nothing where there is no Triton, or one that is built otherwise."""
    with suppress(ImportError, AttributeError):
        import triton.language as tl
        from triton.language.core import is_builtin
        from triton.runtime import interpreter

        patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope

        def patch_what_is_not_patched(function):
            languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
            return patch(function) if any(is_builtin(language.load) for language in languages) else nothing()

        interpreter._patch_lang = patch_what_is_not_patched
        builder = interpreter.interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=False)
