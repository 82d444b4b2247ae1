"""What people see: tables in a terminal and pictures in a file. The only place that prints or draws.

It knows how to show a table or a curve, and nothing about what is in it: whoever has results turns them into a
`Table` or `Panel` of plain words and numbers and hands these over.
"""
