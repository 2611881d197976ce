"""What is the public face?"""
