"""The specs a recipe is made of: frozen, strict, and unable to say an impossible thing.

No torch in here: a recipe is checked in milliseconds, before anything is loaded. Every field's description is the
recipe reference (docs/recipes.md is generated from it).
"""
