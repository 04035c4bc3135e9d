"""Will it run?"""
