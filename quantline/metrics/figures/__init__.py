"""The figures that quantline comes with, a module for each group."""
