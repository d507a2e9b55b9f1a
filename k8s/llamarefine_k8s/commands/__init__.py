"""The commands of `llamarefine`: their options, and what they print.

The only package that imports click and rich's consoles and tables. Commands call runs/ and cluster/, which do not
import this package.

launch.py, monitoring.py, results.py and maintenance.py define the commands, grouped by what a user does; options.py
holds the options they share, display.py and output.py what they print, terminal.py the console and the exit codes.
"""
